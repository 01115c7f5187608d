"""A chain of commands as a file: read it, check it, run it, go on after a kill.

    name: A chat model in four bits
    variables:
      model: zoo:tiny-lm
      text: wiki.txt
    stages:
      small:
        quantize: ${model}
        method: offq
        bits: w4a4kv4
        calibration: ${text}
      quality:
        evaluate: ${small}
        text: ${text}

A stage is one command of the command line: its words and arguments under the command's name, its options under
theirs. ``${name}`` is a variable, or the output of an earlier stage. Where outputs go is not the recipe's business:
every stage writes into its own folder of the run, so a recipe can read what it names and write nowhere else.
"""

from postlude.recipes.commands import Command, Parameter
from postlude.recipes.recipe import Recipe, read
from postlude.recipes.run import Done, State, run, state
from postlude.recipes.stage import Stage

__all__ = ["Command", "Done", "Parameter", "Recipe", "Stage", "State", "read", "run", "state"]
