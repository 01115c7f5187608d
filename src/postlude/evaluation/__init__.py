"""What a model is worth: one file per question, each with the numbers that answer it."""
