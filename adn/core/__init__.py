"""What makes a net any-depth: the value, the kinds of choices, the behaviours of modules, the plan, the state, the
regions a compiler may see. Knows no model and no task."""
