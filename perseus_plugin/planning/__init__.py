"""Which clock for which instruction? From a profile to a plan and a frontier. Pure, but for its processes and files."""
