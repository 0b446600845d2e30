"""What does this machine's GPU do, of all that measuring and control rest on? Work, readings, and what they tell."""
