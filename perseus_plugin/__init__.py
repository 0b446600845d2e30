"""perseus_plugin: less GPU energy at the same speed for pipeline-parallel training.

Importing this package imports neither torch nor ortools; what needs them is loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from perseus_plugin._version import __version__

if TYPE_CHECKING:
    from perseus_plugin.session import Session

__all__ = ["__version__", "enable"]


def enable(engine: Any, config: Any = None) -> Session | None:
    """Attach to a DeepSpeed `PipelineEngine`; for sites that turn `torch.backends` entry points off.

    Args:
        engine: the engine `deepspeed.initialize` returned.
        config: the `perseus` block as a dict, a path of a JSON or YAML file, or None for the one in the
            engine's own DeepSpeed config.

    Returns:
        The session, the one already attached if there is one, or None when the block is absent or disabled.

    Raises:
        ConfigError: the block is wrong, or the engine is no pipeline engine.
    """
    from perseus_plugin.integrations.deepspeed import enable as enable_on_engine

    return enable_on_engine(engine, config)
