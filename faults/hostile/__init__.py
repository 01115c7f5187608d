"""Inputs made to do harm: nothing of them is executed, nothing outside their folder is read, none takes for ever."""
