"""See `process`; run by `perseus_plugin.exchange.processes`."""

import sys

from perseus_plugin.control.helper.process import main

sys.exit(main())
