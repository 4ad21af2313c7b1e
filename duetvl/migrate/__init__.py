"""Runs of MindSpeed-MM as recipes: its data.json, model.json and shell script in, a recipe and a report out."""
