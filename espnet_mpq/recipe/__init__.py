"""What the recipes under egs/ share: stages, jobs, token lists, parts of their reports."""
