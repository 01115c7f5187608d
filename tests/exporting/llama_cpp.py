"""Run by an interpreter that has xllamacpp: what llama.cpp makes of a GGUF file, as JSON on the standard output.

    python llama_cpp.py FILE.gguf < {"prompt": str, "tokens": [[int, ...], ...], "vocabulary": int}

``text`` is the greedy continuation, ``prompt_tokens`` how many tokens the prompt has, ``losses`` the mean negative
log-likelihood of every sequence of ``tokens`` after its first.
"""

from __future__ import annotations

import json
import sys

import xllamacpp


def main() -> None:
    asked = json.load(sys.stdin)
    settings = xllamacpp.CommonParams()
    settings.model.path = sys.argv[1]
    settings.n_ctx, settings.n_parallel, settings.warmup = 512, 1, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(settings)
    done = server.handle_completions(
        {"prompt": asked["prompt"], "n_predict": 32, "temperature": 0, "n_probs": 1}
    )
    losses = []
    for sequence in asked["tokens"]:
        total = 0.0
        for place in range(1, len(sequence)):
            found = server.handle_completions(
                {
                    "prompt": sequence[:place],
                    "n_predict": 1,
                    "temperature": 0,
                    "n_probs": asked["vocabulary"],
                    "cache_prompt": True,
                }
            )
            every = found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            total -= next(one["logprob"] for one in every if one["id"] == sequence[place])
        losses.append(total / (len(sequence) - 1))
    usage = done.get("usage", {})
    print(
        json.dumps(
            {
                "text": done["choices"][0]["text"],
                "prompt_tokens": usage.get("prompt_tokens"),
                "losses": losses,
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()
