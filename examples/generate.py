"""Generates a story from a third of the FFNs' 16-bit bytes. Needs no download."""

import popmm
from popmm import PopConfig

model, tokenizer = popmm.zoo.load("stories")
inputs = tokenizer("Once upon a time, a little fox found a shiny key.", return_tensors="pt")

state = popmm.attach(model, PopConfig(bytes=0.33))
output = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=80)
print(tokenizer.decode(output[0], skip_special_tokens=True))

print(state.summary())
popmm.detach(model)  # the model is as it was, bit for bit
