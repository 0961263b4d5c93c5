#!/usr/bin/env python3
"""Compares oxseek and llama.cpp on GGUF files of the demo model: greedy text, and where it parts the margin.

usage: check.py --oxseek BINARY --llama FOLDER_OF_BINARIES [--model FOLDER]

1. `oxseek quantize` writes the demo model in every format; both engines continue the same prompts from that file.
2. `llama-quantize` writes them from our BF16 file; again both engines continue the prompts from the same file.
3. Where the format keeps the weights (F32, and BF16 and F16 nearly), the text is that of the safetensors too.

Two texts count as equal when they are, or when at the token where they part oxseek's two best tokens are closer than
the margin below: llama.cpp rounds activations, to BF16 or to 8 bits, as oxseek does not with --precision exact.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request

TOKENS = 48
PROMPTS = [
    "<｜User｜>Tell me a story.<｜Assistant｜></think>",
    "<｜User｜>What is your name?<｜Assistant｜></think>",
    "<｜User｜>A dog and a cat went to the park.<｜Assistant｜></think>",
    "Once upon a time",
    "The little boat",
    "Tom had a big red ball. He",
]
# Nats between the two best tokens.
MARGIN = {"f32": 0.01, "f16": 0.05, "bf16": 0.1}
MARGIN_BLOCKS = 0.5
OURS = ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q6_k", "q5_k_m", "q4_k", "q4_k_m",
        "q3_k", "q2_k", "iq4_nl", "iq4_xs", "mxfp4"]
THEIRS = ["F16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "Q3_K_M", "Q2_K",
          "IQ4_NL", "IQ4_XS", "MXFP4_MOE"]


class Oxseek:
    """A server on a free port, for one model."""

    def __init__(self, binary, model):
        command = [binary, "serve", "--port", "0", "--precision", "exact", "--ctx", "512", "-m", model]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.log = []
        self.base = None
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"listening on (http://\S+)", line):
                self.base = found[1]
            if line.rstrip().endswith("is ready"):
                models = json.load(urllib.request.urlopen(self.base + "/v1/models"))
                self.name = models["data"][0]["id"]
                return
        sys.exit("oxseek ended: " + "".join(self.log))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()

    def complete(self, prompt):
        """Text, and per token its place in the text and the nats to the second best."""
        body = {"prompt": prompt, "temperature": 0, "max_tokens": TOKENS, "logprobs": 2, "model": self.name}
        request = urllib.request.Request(self.base + "/v1/completions", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        choice = json.load(urllib.request.urlopen(request))["choices"][0]
        margins = []
        for top in choice["logprobs"]["top_logprobs"]:
            best = sorted(top.values(), reverse=True)
            margins.append(best[0] - best[1] if len(best) > 1 else 0.0)
        return choice["text"], choice["logprobs"]["text_offset"], margins


def llama(folder, model, prompt):
    command = [os.path.join(folder, "llama-completion"), "-m", model, "-t", "2", "--temp", "0", "-n", str(TOKENS),
               "-c", "512", "-no-cnv", "--no-display-prompt", "-p", prompt]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
    if done.returncode != 0:
        raise RuntimeError("llama-completion: " + done.stderr.decode(errors="replace")[-600:])
    return done.stdout.decode(errors="replace").replace(" [end of text]", "")


def compare(ours, theirs, margin):
    """Whether two texts are equal within the margin, and a note on where they part."""
    text, offsets, margins = ours
    # Whole characters that both have: either may end inside of one, or with spaces that the other trims.
    a, b = text.strip("\ufffd\n "), theirs.strip("\ufffd\n ")
    shift = len(text) - len(text.lstrip("\ufffd\n "))
    if a == b:
        return True, f"{len(margins)} tokens equal"
    same = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    start = offsets[0] if offsets else 0
    token = max((i for i, at in enumerate(offsets) if at - start <= same + shift), default=0)
    near = margins[token]
    return near < margin, f"part at token {token} of {len(margins)}, margin {near:.3f}"


def check(kind, label, path, args, expected):
    margin = MARGIN.get(label.lower(), MARGIN_BLOCKS)
    failed, notes, answers = 0, [], []
    with Oxseek(args.oxseek, path) as oxseek:
        for prompt in PROMPTS:
            ours = oxseek.complete(prompt)
            answers.append(ours)
            good, note = compare(ours, llama(args.llama, path, prompt), margin)
            failed += not good
            notes.append(note if good else note + " FAILED")
    print(f"{kind:<6} {label:<9} both engines, within {margin}: {'; '.join(notes)}", flush=True)
    if expected:
        results = [compare(e, a[0], margin) for e, a in zip(expected, answers)]
        exact = label.lower() in MARGIN
        failed += sum(not good for good, _ in results) if exact else 0
        print(f"{'':<6} {'':<9} against safetensors: {'; '.join(note for _, note in results)}"
              f"{'' if exact else ' (for information)'}", flush=True)
    return failed


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--oxseek", default="target/release/oxseek")
    parser.add_argument("--llama", required=True)
    parser.add_argument("--model", default="models/oxseek-demo")
    args = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as work:
        with Oxseek(args.oxseek, args.model) as oxseek:
            expected = [oxseek.complete(p) for p in PROMPTS]
        bf16 = os.path.join(work, "bf16.gguf")
        subprocess.run([args.oxseek, "quantize", args.model, bf16, "--format", "bf16"], check=True,
                       stdout=subprocess.DEVNULL)
        for fmt in OURS:
            path = os.path.join(work, "model.gguf")
            subprocess.run([args.oxseek, "quantize", args.model, path, "--format", fmt], check=True,
                           stdout=subprocess.DEVNULL)
            failed += check("ours", fmt, path, args, expected)
            os.remove(path)
        for fmt in THEIRS:
            path = os.path.join(work, "model.gguf")
            done = subprocess.run([os.path.join(args.llama, "llama-quantize"), bf16, path, fmt, "2"],
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
            if done.returncode != 0:
                sys.exit(f"llama-quantize {fmt}: " + done.stdout.decode(errors="replace")[-600:])
            failed += check("theirs", fmt, path, args, expected)
            os.remove(path)
    print("all equal within margin" if failed == 0 else f"{failed} texts differ")
    sys.exit(failed != 0)


if __name__ == "__main__":
    main()
