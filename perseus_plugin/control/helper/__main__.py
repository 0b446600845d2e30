"""`python -m perseus_plugin.control.helper`."""

import sys

from perseus_plugin.control.helper.process import main

sys.exit(main())
