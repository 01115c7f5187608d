"""The world outside: checkpoints, data, runs that resume, several processes, and what people see of them."""
