"""Serves an exported run with vLLM and compares it with moeloom and with transformers.

    python tools/serving.py --server-python VLLM_ENVIRONMENT/bin/python [--folder DIR]

A small model is trained on sums and exported. Twenty prompts are continued greedily, all in fp32: by moeloom, by
transformers, by vLLM as a library with and without drafts of the multi-token module, and by vLLM's server with the
OpenAI interface. The tokens, the reason of each end and the log-probability of every token must agree. vLLM has an
environment of its own, because it needs an older transformers.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-3
"""The largest difference of a token's log-probability, in nats."""

TOKENS = 64
"""The most tokens that are written after a prompt."""

PROMPTS = 20

WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]
SERVED = "served"
"""The name of the model at the server."""

Answers = list[dict[str, Any]]
"""For each prompt: `tokens` without the one that ends the text, their `logprobs`, `ended` (stop or length), `text`."""


def main() -> None:
    """Runs the comparison; exits with 1 if anything differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--server-python", type=Path, required=True, metavar="FILE", help="python with vLLM"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/serving"), help="where the run is written"
    )
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    prompts = train_and_export(folder)
    answers = {"moeloom": of_moeloom(folder / "run", prompts)}
    answers["transformers"] = of_transformers(folder / "served", prompts)
    answers["vllm"] = of_vllm(arguments.server_python, folder, prompts)
    answers["vllm with drafts"] = of_vllm(arguments.server_python, folder, prompts, drafts=1)
    answers["vllm server"] = of_server(arguments.server_python, folder, prompts)
    (folder / "answers.json").write_text(json.dumps(answers, indent=1))
    print(f"prompts {len(prompts)}, fp32, greedy, at most {TOKENS} tokens")
    failed = [
        name for name in list(answers)[1:] if not compare(name, answers[name], answers["moeloom"])
    ]
    sys.exit(1 if failed else 0)


def train_and_export(folder: Path) -> list[str]:
    """Trains the toy on texts of one to eight sums and exports it to `served`; returns the prompts, all different."""
    draw = random.Random(0)
    texts = []
    for _ in range(2000):
        sums = []
        for _ in range(draw.randint(1, 8)):
            a, b = draw.randrange(7), draw.randrange(7)
            sums.append(f"{WORDS[a]} and {WORDS[b]} make {WORDS[a + b]}.")
        texts.append(" ".join(sums))
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "sums.jsonl").write_text("".join(lines))
    for made in ("run", "served"):
        shutil.rmtree(folder / made, ignore_errors=True)
    recipe = str(ROOT / "recipes/serving/toy.yaml")
    corpus = f"data.corpus.paths=[{folder / 'sums.jsonl'}]"
    moeloom("fit", recipe, corpus, "--out", str(folder / "run"))
    moeloom("convert", "to-hf", str(folder / "run"), str(folder / "served"), "--dtype", "fp32")
    prompts = dict.fromkeys(" ".join(text.split()[: draw.randint(1, 30)]) for text in texts)
    return list(prompts)[:PROMPTS]


def moeloom(command: str, *arguments: str) -> None:
    """Runs one of moeloom's commands."""
    subprocess.run([sys.executable, "-m", f"core.{command}", *arguments], cwd=ROOT, check=True)


def of_moeloom(run: Path, prompts: list[str]) -> Answers:
    """What moeloom writes."""
    import torch

    from core.run.loaded import load_run

    loaded = load_run(run)
    answers = []
    for one in loaded.complete(prompts, tokens=TOKENS, temperature=0):
        ended = "length" if one.ended == "length" else "stop"
        ids = [*one.prompt, *one.tokens]
        with torch.no_grad():
            logits = loaded.model.logits(torch.tensor([ids]))[0]
        found = chosen_logprobs(logits, ids, len(one.prompt))
        answers.append({"tokens": one.tokens, "logprobs": found, "ended": ended, "text": one.text})
    return answers


def of_transformers(served: Path, prompts: list[str]) -> Answers:
    """What transformers' generate writes with the exported files alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(served)
    model = AutoModelForCausalLM.from_pretrained(served, dtype=torch.float32).eval()
    answers = []
    for prompt in prompts:
        given = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**given, max_new_tokens=TOKENS, do_sample=False)[0].tolist()
        start = given["input_ids"].shape[1]
        ended = "stop" if ids[-1] == model.generation_config.eos_token_id else "length"
        if ended == "stop":
            ids.pop()
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        found = chosen_logprobs(logits, ids, start)
        text = tokenizer.decode(ids[start:], clean_up_tokenization_spaces=False)
        answers.append({"tokens": ids[start:], "logprobs": found, "ended": ended, "text": text})
    return answers


def chosen_logprobs(logits_LV: Any, ids: list[int], start: int) -> list[float]:
    """The log-probability of each token from `start` on, in nats."""
    logprobs_LV = logits_LV.double().log_softmax(dim=-1)
    return [float(logprobs_LV[place - 1, ids[place]]) for place in range(start, len(ids))]


def environment_of_vllm() -> dict[str, str]:
    """The environment of vLLM's processes: no network, its small cache, moeloom's packages out of the way."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {
        **kept,
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }


def of_vllm(python: Path, folder: Path, prompts: list[str], drafts: int = 0) -> Answers:
    """What vLLM writes as a library, with some drafts of the multi-token module for each pass."""
    served = str(folder / "served")
    asked = {"model": served, "prompts": prompts, "tokens": TOKENS, "drafts": drafts}
    done = subprocess.run(
        [python, str(ROOT / "tools/serving_vllm.py")],
        input=json.dumps(asked),
        env=environment_of_vllm(),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    answers: Answers = json.loads(done.stdout.splitlines()[-1])
    return answers


def of_server(python: Path, folder: Path, prompts: list[str]) -> Answers:
    """What vLLM's server answers at its OpenAI interface."""
    answers = []
    with server(python, folder) as address:
        for prompt in prompts:
            asked = {
                "model": SERVED,
                "prompt": prompt,
                "max_tokens": TOKENS,
                "temperature": 0,
                "logprobs": 1,
                "return_token_ids": True,
            }
            (choice,) = post(f"{address}/v1/completions", asked)["choices"]
            tokens = list(choice["token_ids"])
            logprobs = choice["logprobs"]["token_logprobs"]
            if choice["finish_reason"] == "stop":
                tokens, logprobs = tokens[:-1], logprobs[: len(tokens) - 1]
            answers.append(
                {
                    "tokens": tokens,
                    "logprobs": logprobs,
                    "ended": choice["finish_reason"],
                    "text": choice["text"],
                }
            )
    return answers


@contextmanager
def server(python: Path, folder: Path) -> Any:
    """Runs vLLM's server on a free port of this machine while the block runs; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        python,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(folder / "served"),
    ]
    command += ["--served-model-name", SERVED, "--dtype", "float32", "--enforce-eager"]
    command += [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--max-model-len",
        "128",
        "--max-num-seqs",
        "8",
    ]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment_of_vllm(), stdout=log, stderr=log, start_new_session=True
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, folder / "server.log")
            yield f"http://127.0.0.1:{port}"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path, seconds: int = 600) -> None:
    """Waits until the server answers."""
    for _ in range(seconds):
        if process.poll() is not None:
            raise SystemExit(f"the server ended with code {process.returncode}; see {log}")
        with suppress(OSError), urllib.request.urlopen(address, timeout=5):
            return
        time.sleep(1)
    raise SystemExit(f"the server did not answer in {seconds} s; see {log}")


def post(address: str, content: dict[str, Any]) -> Any:
    """The JSON answer to a JSON question."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address, json.dumps(content).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def compare(name: str, found: Answers, expected: Answers) -> bool:
    """Prints how far answers are from those expected; whether they agree."""
    same = dict.fromkeys(("tokens", "ended", "text"), 0)
    differences = []
    for one, other in zip(found, expected, strict=True):
        for key in same:
            same[key] += one[key] == other[key]
        pairs = zip(one["logprobs"], other["logprobs"], strict=False)
        differences += [abs(a - b) for a, b in pairs]
    wanted = sum(len(one["logprobs"]) for one in expected)
    far = max(differences, default=math.inf)
    finite = all(map(math.isfinite, differences)) and len(differences) == wanted
    agree = ", ".join(f"{key} {number}/{len(expected)}" for key, number in same.items())
    compared = f"{len(differences)} of {wanted} log-probabilities within {far:.2g} nats"
    print(f"{name} beside moeloom: equal {agree}; {compared}")
    return finite and all(number == len(expected) for number in same.values()) and far <= TOLERANCE


if __name__ == "__main__":
    main()
