"""The networks and their mathematics: pure torch, no Ray, no logging, no files but weights."""
