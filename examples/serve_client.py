"""Ask a running server, whole and in a stream.

transformers-async-cb serve MODEL &
python examples/serve_client.py --url http://127.0.0.1:8000
"""

import argparse

from openai import OpenAI


parser = argparse.ArgumentParser()
parser.add_argument("--url", default="http://127.0.0.1:8000")
parser.add_argument("--question", default="What is the capital of France?")
options = parser.parse_args()

client = OpenAI(base_url=f"{options.url}/v1", api_key="none")
model = client.models.list().data[0].id
messages = [{"role": "user", "content": options.question}]

answer = client.chat.completions.create(model=model, messages=messages, max_completion_tokens=64, temperature=0)
print(answer.choices[0].message.content)
print(answer.choices[0].finish_reason, answer.usage.completion_tokens)

stream = client.chat.completions.create(
    model=model, messages=messages, max_completion_tokens=64, temperature=0.8, top_p=0.95, seed=1, stop=["\n\n"],
    extra_body={"min_p": 0.05}, stream=True,
)  # fmt: skip
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
