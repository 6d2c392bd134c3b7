"""A model server that costs nothing: the same answer to everybody, whole or as CHUNKS events. Arguments: PORT CHUNKS.

What LiteLLM's proxy is put in front of in ``bench_gateway``; runs in the proxy's own environment (uvicorn).
"""

import json
import sys

import uvicorn

PORT, CHUNKS = int(sys.argv[1]), int(sys.argv[2])
COMMON = {"id": "chatcmpl-1", "created": 1, "model": "m"}


def chunk(delta, reason=None):
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    value = {**COMMON, "object": "chat.completion.chunk", "choices": [choice]}
    return b"data: " + json.dumps(value).encode() + b"\n\n"


WHOLE = json.dumps(
    {
        **COMMON,
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello there"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18},
    }
).encode()
PIECE, END = chunk({"role": "assistant", "content": "tok "}), chunk({}, "stop") + b"data: [DONE]\n\n"


async def app(scope, receive, send):
    assert scope["type"] == "http"
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    streamed = bool(json.loads(body).get("stream"))
    kind = b"text/event-stream" if streamed else b"application/json"
    headers = [(b"content-type", kind)] + ([] if streamed else [(b"content-length", str(len(WHOLE)).encode())])
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if not streamed:
        await send({"type": "http.response.body", "body": WHOLE})
        return
    for _ in range(CHUNKS):
        await send({"type": "http.response.body", "body": PIECE, "more_body": True})
    await send({"type": "http.response.body", "body": END})


uvicorn.run(app, host="127.0.0.1", port=PORT, access_log=False, log_level="warning", lifespan="off")
