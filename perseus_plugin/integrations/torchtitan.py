"""torchtitan: a flag of its trainer turns the plugin on, where an environment variable cannot be given.

    --override.imports 'perseus_plugin.integrations.torchtitan.perseus={"config": "perseus.yaml"}'

An override is called before anything is built; this one replaces nothing. Only torchtitan imports this module.
"""

from __future__ import annotations

from typing import Any

from torchtitan.components.metrics import MetricsProcessor
from torchtitan.config import override

from perseus_plugin.integrations.torch_pipelining.turning_on import turn_on


def perseus(unchanged: Any, config: str) -> Any:
    """Have the pipeline's schedule be hooked when the trainer builds it.

    Args:
        unchanged: a part of the trainer's settings that every job has once.
        config: path of a YAML or JSON file with the `perseus` block.
    """
    turn_on(config)
    return unchanged


override(target=MetricsProcessor.Config, description="perseus_plugin is turned on")(perseus)
