"""The server through OpenAI's own client: chats and completions, streamed and whole, and the errors it raises.

    python openai_client.py BASE_URL API_KEY MODEL
"""

import sys

import openai

base, key, model = sys.argv[1:4]
client = openai.OpenAI(base_url=base, api_key=key, max_retries=0)
messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who goes there?"}]

assert [m.id for m in client.models.list()] == [model]
assert client.models.retrieve(model).id == model

whole = client.chat.completions.create(model=model, messages=messages, max_tokens=20, temperature=0)
assert whole.choices[0].message.role == "assistant" and whole.choices[0].message.content
assert whole.usage.completion_tokens <= 20 and whole.usage.total_tokens > whole.usage.completion_tokens

stream = client.chat.completions.create(
    model=model, messages=messages, max_tokens=20, temperature=0, stream=True,
    stream_options={"include_usage": True})
text, usage, reason = "", None, None
for chunk in stream:
    if chunk.choices:
        text += chunk.choices[0].delta.content or ""
        reason = chunk.choices[0].finish_reason or reason
    usage = chunk.usage or usage
assert text == whole.choices[0].message.content, (text, whole)
assert usage == whole.usage and reason == whole.choices[0].finish_reason

several = client.completions.create(
    model=model, prompt=["In the beginning", "The king"], n=2, max_tokens=12, temperature=0.8, seed=3, stop=["\n\n"])
assert [c.index for c in several.choices] == [0, 1, 2, 3]
again = client.completions.create(
    model=model, prompt=["In the beginning", "The king"], n=2, max_tokens=12, temperature=0.8, seed=3, stop=["\n\n"])
assert [c.text for c in several.choices] == [c.text for c in again.choices]

for error, call in [
    (openai.NotFoundError, lambda: client.completions.create(model="other", prompt="a")),
    (openai.BadRequestError, lambda: client.completions.create(model=model, prompt="a", temperature=-1)),
    (openai.BadRequestError, lambda: client.completions.create(model=model, prompt="a " * 9000)),
    (openai.AuthenticationError,
     lambda: openai.OpenAI(base_url=base, api_key="wrong", max_retries=0).models.list()),
]:
    try:
        call()
    except error as raised:
        assert raised.body["message"], raised.body
    else:
        sys.exit(f"{error.__name__} was not raised")

# Given up half-way: the server must go on as before.
half = client.completions.create(model=model, prompt="It was", max_tokens=200, stream=True)
next(iter(half))
half.close()
assert client.completions.create(model=model, prompt="It was", max_tokens=4).usage.completion_tokens == 4
print("openai", openai.__version__, "is content:", text.strip()[:60])
