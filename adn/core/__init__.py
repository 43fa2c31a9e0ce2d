"""What makes a net any-depth: the value, the switches, the behaviours given to its modules, the plan, the state, the
regions a compiler may see. Knows no model and no task."""
