"""OpenAI's API as endpoints."""

from gateway.endpoint import Endpoint, Parameter
from gateway.openai.answers import ChatChunk, ChatCompletion, Completion, CompletionChunk, EmbeddingList
from gateway.openai.chat import chat
from gateway.openai.completions import completions
from gateway.openai.embeddings import EmbeddingBody, embeddings
from gateway.openai.models import ModelList, ModelObject, list_models, retrieve_model
from gateway.openai.remembered import HEADER as CACHE_HEADER
from gateway.openai.requests import ChatBody, CompletionBody
from gateway.request import PRIVACY_HEADER

_STREAMED = ("application/json", "text/event-stream")
_TEXT = {"type": "string", "maxLength": 255}
_KEY = Parameter(
    name="idempotency-key",
    place="header",
    description="The same key and body within 24 hours: the same answer, charged once.",
    schema=_TEXT,
)
_PRIVACY = Parameter(
    name=PRIVACY_HEADER,
    place="header",
    description="trusted or local: who may compute, beyond what the operator laid down.",
    schema=_TEXT,
)
_CACHE = Parameter(
    name=CACHE_HEADER,
    place="header",
    description="use: an answer that was given before will do, free of charge (temperature 0 only).",
    schema={"type": "string", "enum": ["use"]},
)

ENDPOINTS = (
    Endpoint(
        method="POST",
        path="/v1/chat/completions",
        handle=chat,
        needs="inference",
        summary="Answer a conversation",
        body=ChatBody,
        answer=ChatCompletion,
        event=ChatChunk,
        media=_STREAMED,
        parameters=(_KEY, _PRIVACY, _CACHE),
    ),
    Endpoint(
        method="POST",
        path="/v1/completions",
        handle=completions,
        needs="inference",
        summary="Continue a prompt",
        body=CompletionBody,
        answer=Completion,
        event=CompletionChunk,
        media=_STREAMED,
        parameters=(_KEY, _PRIVACY, _CACHE),
    ),
    Endpoint(
        method="POST",
        path="/v1/embeddings",
        handle=embeddings,
        needs="inference",
        summary="Texts as vectors",
        body=EmbeddingBody,
        answer=EmbeddingList,
        parameters=(_PRIVACY,),
    ),
    Endpoint(
        method="GET",
        path="/v1/models",
        handle=list_models,
        needs="models:read",
        summary="List models",
        answer=ModelList,
    ),
    Endpoint(
        method="GET",
        path="/v1/models/{model:path}",
        handle=retrieve_model,
        needs="models:read",
        summary="One model",
        answer=ModelObject,
    ),
)
