"""Recipes: YAML in, a validated `Recipe` and a concrete `Plan` out."""
