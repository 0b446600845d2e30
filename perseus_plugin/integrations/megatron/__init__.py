"""Megatron-Core: its schedules, arguments, metrics and straggler detector."""

from perseus_plugin.integrations.megatron.arguments import add_arguments

__all__ = ["add_arguments"]  # patches/megatron.patch imports it from here
