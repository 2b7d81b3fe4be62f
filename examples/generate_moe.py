"""Generates with a mixture of experts, each expert pruned by the tokens routed to it. Needs no download."""

import popmm
from popmm import PopConfig

model, tokenizer = popmm.zoo.load("stories-moe")
inputs = tokenizer("Once upon a time, a little fox found a shiny key.", return_tensors="pt")

with popmm.pruned(model, PopConfig(bytes=0.33)) as state:
    output = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=80)
    print(tokenizer.decode(output[0], skip_special_tokens=True))
    print(state.summary())
    for name, partition in state.layers.items():
        print(f"{name}: prompt tokens per expert {partition.tokens.tolist()}")
