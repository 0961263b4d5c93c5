#!/usr/bin/env python3
"""Compares oxseek and llama.cpp on GGUF files of the demo model: greedy text, and where it parts the margin.

usage: check.py --oxseek BINARY --llama FOLDER_OF_BINARIES [--model FOLDER]

1. convert.py writes the demo model in BF16 with llama.cpp's own package, `oxseek quantize` does too: the tensors must
   be the same, byte for byte.
2. `oxseek quantize` writes it in every format; both engines continue the same prompts from that file.
3. `llama-quantize` writes them from the file of convert.py; again both engines continue the prompts from the same file.
4. Where the format keeps the weights (F32, and BF16 and F16 nearly), the text is that of the safetensors too.

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
import time
import urllib.error
import urllib.request

import gguf
import numpy as np

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
# What llama-completion prints where the model ends its answer.
END = " [end of text]"
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
                self.name = self.first_model()
                return
        sys.exit("oxseek ended: " + "".join(self.log))

    def first_model(self):
        """The line in the log comes a moment before the model answers."""
        for _ in range(100):
            try:
                return json.load(urllib.request.urlopen(self.base + "/v1/models"))["data"][0]["id"]
            except urllib.error.HTTPError as e:
                if e.code != 503:
                    raise
                time.sleep(0.05)
        sys.exit("oxseek: never ready")

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
    command = [os.path.join(folder, "llama-completion"), "-m", model, "-t", "1", "--temp", "0", "-n", str(TOKENS),
               "-c", "512", "-no-cnv", "--no-display-prompt", "-p", prompt]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
    if done.returncode != 0:
        raise RuntimeError("llama-completion: " + done.stderr.decode(errors="replace")[-600:])
    text = done.stdout.decode(errors="replace")
    return text.replace(END, "").strip("\ufffd\n "), END in text


def whole(folder, model, prompt, ours):
    """llama.cpp's text, and whether its end was lost: on a busy machine that happens, so it is asked again."""
    ours = ours.strip("\ufffd\n ")
    for _ in range(5):
        text, ended = llama(folder, model, prompt)
        cut = not ended and 0 < len(text) < len(ours) and ours.startswith(text)
        if not cut:
            break
    return text, cut


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
    if token > 0 and offsets[token] - start == same + shift:
        # They part where a token of ours ends: the other may have taken a longer one there ("like", "liked").
        near = min(near, margins[token - 1])
    return near < margin, f"part at token {token} of {len(margins)}, margin {near:.3f}"


def check(kind, label, path, args, expected):
    margin = MARGIN.get(label.lower(), MARGIN_BLOCKS)
    failed, notes, answers = 0, [], []
    with Oxseek(args.oxseek, path) as oxseek:
        for prompt in PROMPTS:
            ours = oxseek.complete(prompt)
            answers.append(ours)
            theirs, cut = whole(args.llama, path, prompt, ours[0])
            good, note = compare(ours, theirs, margin)
            if cut:
                good, note = True, f"equal as far as llama.cpp's output goes, {len(theirs)} characters"
            failed += not good
            notes.append(note if good else note + " FAILED")
    print(f"{kind:<6} {label:<9} both engines, within {margin}: {'; '.join(notes)}", flush=True)
    results = [compare(e, a[0], margin) for e, a in zip(expected, answers)]
    exact = label.lower() in MARGIN
    failed += sum(not good for good, _ in results) if exact else 0
    print(f"{'':<6} {'':<9} against safetensors: {'; '.join(note for _, note in results)}"
          f"{'' if exact else ' (for information)'}", flush=True)
    return failed


def same_tensors(converted, ours):
    """Whether every tensor of the first file is in the second with the same bytes."""
    theirs = {t.name: t for t in gguf.GGUFReader(converted).tensors}
    ours = {t.name: t for t in gguf.GGUFReader(ours).tensors}
    differ = [name for name, t in theirs.items()
              if name not in ours or ours[name].tensor_type != t.tensor_type
              or list(ours[name].shape) != list(t.shape) or not np.array_equal(ours[name].data, t.data)]
    more = sorted({name.split(".")[1] for name in ours if name not in theirs})
    print(f"converted: {len(theirs)} tensors, {len(differ)} differ {differ[:5]}; "
          f"oxseek also writes those of the MTP layer {', '.join(more)}, which llama.cpp ignores", flush=True)
    return not differ


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--oxseek", default="target/release/oxseek")
    parser.add_argument("--llama", required=True)
    parser.add_argument("--model", default="models/oxseek-demo")
    parser.add_argument("--only", nargs="*", help="formats, of either side")
    args = parser.parse_args()

    def asked(formats):
        return [f for f in formats if not args.only or f in args.only]

    failed = 0
    with tempfile.TemporaryDirectory() as work:
        with Oxseek(args.oxseek, args.model) as oxseek:
            expected = [oxseek.complete(p) for p in PROMPTS]
        bf16 = os.path.join(work, "bf16.gguf")
        subprocess.run([args.oxseek, "quantize", args.model, bf16, "--format", "bf16"], check=True,
                       stdout=subprocess.DEVNULL)
        converted = os.path.join(work, "converted.gguf")
        convert = os.path.join(os.path.dirname(os.path.abspath(__file__)), "convert.py")
        subprocess.run([sys.executable, convert, args.model, converted], check=True)
        failed += not same_tensors(converted, bf16)
        for fmt in asked(OURS):
            path = os.path.join(work, "model.gguf")
            subprocess.run([args.oxseek, "quantize", args.model, path, "--format", fmt], check=True,
                           stdout=subprocess.DEVNULL)
            failed += check("ours", fmt, path, args, expected)
            os.remove(path)
        for fmt in asked(THEIRS):
            path = os.path.join(work, "model.gguf")
            done = subprocess.run([os.path.join(args.llama, "llama-quantize"), converted, path, fmt, "2"],
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
            if done.returncode != 0:
                sys.exit(f"llama-quantize {fmt}: " + done.stdout.decode(errors="replace")[-600:])
            failed += check("theirs", fmt, path, args, expected)
            os.remove(path)
    print("all equal within margin" if failed == 0 else f"{failed} texts differ")
    sys.exit(failed != 0)


if __name__ == "__main__":
    main()
