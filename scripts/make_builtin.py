"""Make the built-in data set: prompts, K sampled replies, VADER scores, ranks and word spans.

    python scripts/make_builtin.py src/tokenward/data/builtin/reviews.jsonl.gz

All randomness is seeded. The versions that made the shipped file are in ``reviews.json`` beside it. Replies come from the
default model with the package's 4-bit weights. Only replies that the model ended itself are kept, so no reply is cut off.
"""

import argparse
import gzip
import importlib.metadata
import itertools
import json
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokenward.evaluation.replies import Vader
from tokenward.models.default import GGUF_SHA256, default_model_folder

SEED = 20261123
PROMPTS = 620
KEPT = 4
ROUNDS = 6
SAMPLING = {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "top_k": 0, "max_new_tokens": 64}
BATCH = 120

PLACES = """a coffee shop; a small bakery; a family restaurant; a noodle bar; a pizza place; a city hotel; a beach hotel;
a mountain cabin; a campsite; a youth hostel; a public library; a science museum; an art gallery; a local cinema;
a bookshop; a bicycle shop; a hardware store; a supermarket; a farmers' market; a flower shop; a barber shop;
a swimming pool; a climbing gym; a yoga studio; a dental practice; a car repair garage; a garden centre; a zoo;
a train station; an airport lounge; a language school; a cooking class; a pottery workshop; a concert hall;
a board game cafe; a tea house; a laundrette; a theme park; a botanical garden; a post office""".replace(
    "\n", " "
)
PRODUCTS = """a pair of running shoes; a winter coat; a backpack; a desk lamp; an office chair; a mattress; a coffee machine;
an electric kettle; a rice cooker; a frying pan; a set of kitchen knives; a vacuum cleaner; a washing machine;
a pair of headphones; a wireless keyboard; a laptop; a tablet; a phone case; a smart watch; a digital camera;
a folding bicycle; a tent; a sleeping bag; a garden hose; a lawn mower; a board game; a jigsaw puzzle; a novel;
a cookbook; a city guide book; a weather app; a language learning app; a podcast; a documentary; a comedy film;
a jazz album; a fountain pen; a water bottle; an umbrella; a houseplant""".replace("\n", " ")
SERVICES = """a train ride; a bus journey; a flight; a ferry crossing; a taxi ride; a parcel delivery; a grocery delivery;
a house cleaning; a phone repair; a haircut; an online city tour; a piano lesson; a swimming lesson; a job interview;
a school open day; a wedding party; a birthday dinner; a picnic; a rainy weekend; a long walk; a first day at work;
a moving day; a neighbourhood meeting; a football match; a school play""".replace("\n", " ")

FRAMES = {
    PLACES: [
        "Write a short customer review of {x}, in one or two sentences.",
        "You just visited {x}. Tell a friend what it was like, in one sentence.",
        "Write one sentence of feedback for the owner of {x}.",
        "Write a review of {x} that mentions the staff and the price. Keep it to two short sentences.",
        "What would a disappointed visitor say about {x}? One sentence.",
        "In one or two short sentences, sum up your last visit to {x}.",
        "Write a very short online comment about {x}.",
    ],
    PRODUCTS: [
        "Write a short customer review of {x}, in one or two sentences.",
        "You bought {x} last month. Say in one sentence how it turned out.",
        "Write two short sentences about {x}: one about its quality and one about its price.",
        "What would a critical customer say about {x}? One sentence.",
        "Write one honest sentence about {x} for an online shop.",
        "Write a very short online comment about {x}.",
        "A friend asks whether to get {x}. Answer in one sentence.",
    ],
    SERVICES: [
        "Write one or two sentences in a diary about {x}.",
        "Tell a colleague in one sentence how {x} went.",
        "Write a short message to your sister about {x}.",
        "Describe {x} in one or two short sentences, as somebody who was there.",
        "In one sentence, what was the most memorable thing about {x}?",
        "Write one sentence about what went wrong during {x}.",
        "Write a very short post about {x}.",
    ],
}


def make_prompts(rng: random.Random) -> list[str]:
    prompts = [
        frame.format(x=subject.strip())
        for subjects, frames in FRAMES.items()
        for subject, frame in itertools.product(subjects.split(";"), frames)
    ]
    return rng.sample(prompts, PROMPTS)


@torch.inference_mode()
def sample(prompts: list[str], folder: Path) -> list[list[str]]:
    """Sample up to ``KEPT`` distinct replies per prompt that the model ended itself, in several rounds."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    torch.manual_seed(SEED)
    replies: list[list[str]] = [[] for _ in prompts]
    for number in range(ROUNDS):
        jobs = [index for index, found in enumerate(replies) for _ in range(KEPT - len(found))]
        for start in range(0, len(jobs), BATCH):
            batch = jobs[start : start + BATCH]
            for index, text in zip(
                batch, _replies(model, tokenizer, [prompts[i] for i in batch]), strict=True
            ):
                if text and text not in replies[index]:
                    replies[index].append(text)
            print(f"round {number + 1}: {start + len(batch)} of {len(jobs)} replies", flush=True)
    return replies


def _replies(model, tokenizer, prompts: list[str]) -> list[str]:
    """One sampled reply per prompt; empty if the token limit cut it off."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    rows = model.generate(**inputs, **SAMPLING)[:, inputs["input_ids"].shape[1] :].tolist()
    return [
        tokenizer.decode(row, skip_special_tokens=True).strip() if tokenizer.eos_token_id in row else ""
        for row in rows
    ]


def record(prompt: str, replies: list[str], vader: Vader) -> dict:
    scores = [round(vader.compound(reply), 4) for reply in replies]
    order = sorted(set(scores), reverse=True)
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "responses": replies,
        "ranks": [order.index(score) for score in scores],
        "scores": scores,
        "spans": [
            [[s.start, s.end, round(s.value, 4)] for s in vader.word_spans(reply)] for reply in replies
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    prompts = make_prompts(random.Random(SEED))
    vader = Vader()
    rows = []
    for prompt, replies in zip(prompts, sample(prompts, default_model_folder()), strict=True):
        if len(replies) == KEPT:
            rows.append(record(prompt, replies, vader))
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as file:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    packages = ("torch", "transformers", "tokenizers", "vaderSentiment")
    about = {
        "made_by": "scripts/make_builtin.py",
        "rows": len(rows),
        "prompts_tried": PROMPTS,
        "seed": SEED,
        "sampling": SAMPLING,
        "rounds": ROUNDS,
        "model_gguf_sha256": GGUF_SHA256,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    output.with_name("reviews.json").write_text(json.dumps(about, indent=2) + "\n")
    print(f"{len(rows)} of {PROMPTS} prompts kept")


if __name__ == "__main__":
    main()
