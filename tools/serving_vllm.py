"""Continues prompts with vLLM as a library; runs in vLLM's environment, reads JSON from stdin, prints JSON."""

import json
import sys

from vllm import LLM, SamplingParams


def main() -> None:
    """Reads model, prompts and tokens; prints for each prompt what `tools/serving.py` compares."""
    asked = json.load(sys.stdin)
    drafting = {"method": "mtp", "num_speculative_tokens": asked["drafts"]}
    llm = LLM(
        model=asked["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=8,
        seed=0,
        speculative_config=drafting if asked["drafts"] else None,
    )
    sampling = SamplingParams(temperature=0, max_tokens=asked["tokens"], logprobs=1)
    answers = []
    for output in llm.generate(asked["prompts"], sampling, use_tqdm=False):
        (written,) = output.outputs
        tokens = list(written.token_ids)
        logprobs = [
            step[token].logprob for step, token in zip(written.logprobs, tokens, strict=True)
        ]
        if written.finish_reason == "stop":
            tokens, logprobs = tokens[:-1], logprobs[:-1]
        answers.append(
            {
                "tokens": tokens,
                "logprobs": logprobs,
                "ended": written.finish_reason,
                "text": written.text,
            }
        )
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
