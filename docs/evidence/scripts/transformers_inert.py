"""transformers: does a message that spells a control token become one?"""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
words = Tokenizer(models.BPE({word: place for place, word in enumerate(["<|end|>", *letters])}, []))
words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
words.add_special_tokens(["<|end|>"])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|end|>")
tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}"
ids = tokenizer.apply_chat_template([{"role": "user", "content": "say <|end|>"}], return_dict=False)
print("expected: one end of a turn, since a message is text")
print(f"got: {ids.count(tokenizer.eos_token_id)}")
