"""The coordinator's planner: what is known as an overlay and demands, the loop that plans, and what agents are told."""
