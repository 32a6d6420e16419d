"""The order of things: the command line, recipes, the stages, cluster submission and evaluation."""
