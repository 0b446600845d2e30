"""DeepSpeed: its pipeline engine and schedules."""
