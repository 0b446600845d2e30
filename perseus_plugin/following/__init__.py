"""Once there are plans: which schedules get one, and whether plans hold. Pure, but for what publishes and collects."""
