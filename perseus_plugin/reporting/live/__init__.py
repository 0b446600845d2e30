"""While it runs: accounts, comparison with full clocks, summary, metrics, log."""
