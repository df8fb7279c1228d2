"""The six assignments. Each file has one: its parts, its cases, its judges; N.md is its handout."""
