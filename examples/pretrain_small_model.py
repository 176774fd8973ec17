"""Pre-train a small language model on the text of a preference dataset, so that `ropo train` can be tried offline.

    python examples/pretrain_small_model.py DATASET MODEL_FOLDER [minutes]

DATASET is anything `ropo train` reads as text, for example the Anthropic HH-RLHF transcripts. The model (2.6 million
parameters, vocabulary 4096) sees chosen and rejected responses alike: it learns the language, not the preference.
"""

import sys
import time

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ropo import load_pairs

source, folder, minutes = sys.argv[1], sys.argv[2], float(sys.argv[3]) if len(sys.argv) > 3 else 5.0
texts = [f"{pair.prompt}{response}" for pair in load_pairs(source).pairs for response in (pair.chosen, pair.rejected)]

raw = Tokenizer(models.BPE())
raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
raw.train_from_iterator(
    texts, trainers.BpeTrainer(vocab_size=4096, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet)
)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>")

torch.manual_seed(0)
shape = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6}
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=4096, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, **shape)
)
stream = torch.tensor([token for text in texts for token in [*tokenizer(text)["input_ids"], 1]])
optimizer, start, step = torch.optim.AdamW(model.parameters(), lr=1e-3), time.monotonic(), 0
while (spent := (time.monotonic() - start) / 60 / minutes) < 1:
    optimizer.param_groups[0]["lr"] = 1e-3 * min((step + 1) / 50, 1.05 - spent)
    where = torch.randint(len(stream) - 257, (8, 1)) + torch.arange(257)
    loss = model(input_ids=stream[where[:, :-1]], labels=stream[where[:, :-1]]).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    step += 1
    if step % 50 == 0:
        print(f"step {step}: {loss.item():.2f} nats per token, {spent:.0%} of the time", flush=True)
model.save_pretrained(folder)
tokenizer.save_pretrained(folder)
