"""An OpenID Connect provider in a process of its own, built with authlib: everybody who comes is logged in already.

Prints its port; ends when its input does. ``POST /lie`` with JSON makes it misbehave from then on: ``claims`` override
those of ID tokens (None leaves one out), ``alg`` none or HS256 forges them, ``foreign`` signs with a key it does not
publish, ``iss`` goes into the answer's query, ``error`` refuses, ``user`` is who comes. ``GET /asked`` tells the query
of the last authorization request.
"""

import base64
import hashlib
import hmac
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import parse_qsl, urlencode, urlsplit

os.environ["AUTHLIB_INSECURE_TRANSPORT"] = "1"  # It is on loopback.

from authlib.oauth2.rfc6749 import AuthorizationServer, ClientMixin, OAuth2Request
from authlib.oauth2.rfc6749.grants import AuthorizationCodeGrant
from authlib.oauth2.rfc6749.requests import BasicOAuth2Payload
from authlib.oauth2.rfc6750 import BearerTokenGenerator
from authlib.oauth2.rfc7636 import CodeChallenge
from authlib.oidc.core import UserInfo
from authlib.oidc.core.grants import OpenIDCode
from joserfc.jwk import RSAKey

CLIENT_ID, SECRET = "rios-test", "s3cret with spaces & signs"
KEY, FOREIGN = (RSAKey.generate_key(2048, {"kid": "k1", "use": "sig"}) for _ in range(2))
USER = {"sub": "u-1", "preferred_username": "grace", "email": "grace@provider.example", "email_verified": True}
lies: dict = {}
codes: dict = {}
asked: dict = {}


class Client(ClientMixin):
    def get_client_id(self):
        return CLIENT_ID

    def get_default_redirect_uri(self):
        return None

    def get_allowed_scope(self, scope):
        return scope

    def check_redirect_uri(self, redirect_uri):
        return urlsplit(redirect_uri).path == "/v1/auth/oidc/callback"

    def check_client_secret(self, client_secret):
        return hmac.compare_digest(client_secret, SECRET)

    def check_endpoint_auth_method(self, method, endpoint):
        return method in ("client_secret_basic", "client_secret_post")

    def check_response_type(self, response_type):
        return response_type == "code"

    def check_grant_type(self, grant_type):
        return grant_type == "authorization_code"


class Code(SimpleNamespace):
    def get_redirect_uri(self):
        return self.redirect_uri

    def get_scope(self):
        return self.scope

    def get_nonce(self):
        return self.nonce

    def get_auth_time(self):
        return None

    get_acr = get_amr = get_auth_time


class Grant(AuthorizationCodeGrant):
    def save_authorization_code(self, code, request):
        data = request.payload.data
        codes[code] = Code(
            code=code,
            redirect_uri=request.payload.redirect_uri,
            scope=request.scope,
            nonce=data.get("nonce"),
            code_challenge=data.get("code_challenge"),
            code_challenge_method=data.get("code_challenge_method"),
            user=request.user,
        )

    def query_authorization_code(self, code, client):
        return codes.get(code)

    def delete_authorization_code(self, authorization_code):
        del codes[authorization_code.code]

    def authenticate_user(self, authorization_code):
        return authorization_code.user


class IdTokens(OpenIDCode):
    def exists_nonce(self, nonce, request):
        return False

    def resolve_client_private_key(self, client):
        return FOREIGN if lies.get("foreign") else KEY

    def get_client_claims(self, client):
        return {"iss": provider.issuer, "aud": [CLIENT_ID]}

    def get_encode_header(self, client):
        return {"alg": "RS256", "kid": "k1"}

    def generate_user_info(self, user, scope):
        return UserInfo(user)

    def process_token(self, grant, response):
        token = super().process_token(grant, response)
        token["id_token"] = distorted(token["id_token"])
        return token


def distorted(id_token):
    """The same token with the lies of the moment, signed again."""
    if not lies:
        return id_token
    claims = json.loads(unbase64(id_token.split(".")[1])) | lies.get("claims", {})
    claims = {name: value for name, value in claims.items() if value is not None}
    algorithm = lies.get("alg", "RS256")
    signed = f"{base64url({'alg': algorithm, 'kid': 'k1'})}.{base64url(claims)}"
    if algorithm == "none":
        return f"{signed}."
    if algorithm == "HS256":  # the public key as the secret: the classic swap
        return f"{signed}.{raw_base64url(hmac.digest(KEY.as_pem(private=False), signed.encode(), hashlib.sha256))}"
    from joserfc import jwt

    return jwt.encode({"alg": "RS256", "kid": "k1"}, claims, FOREIGN if lies.get("foreign") else KEY)


def base64url(value):
    return raw_base64url(json.dumps(value).encode())


def raw_base64url(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def unbase64(text):
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


class Provider(AuthorizationServer):
    def __init__(self, issuer):
        super().__init__()
        self.issuer = issuer
        self.register_grant(Grant, [CodeChallenge(required=True), IdTokens(require_nonce=True)])
        self.register_token_generator("default", BearerTokenGenerator(lambda *_, **__: os.urandom(16).hex()))

    def query_client(self, client_id):
        return Client() if client_id == CLIENT_ID else None

    def save_token(self, token, request):
        pass

    def send_signal(self, name, *args, **kwargs):
        pass

    def create_oauth2_request(self, request):
        made = Asked(request.command, f"{self.issuer}{request.path}", headers=request.headers)
        made.payload = BasicOAuth2Payload(request.values)
        made.values = request.values
        return made

    def handle_response(self, status, body, headers):
        return status, body, headers


class Asked(OAuth2Request):
    @property
    def args(self):
        return self.values

    form = args


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        parts = urlsplit(self.path)
        self.values = dict(parse_qsl(parts.query))
        issuer = provider.issuer
        if parts.path == "/.well-known/openid-configuration":
            self.answer(
                {
                    "issuer": issuer,
                    "authorization_endpoint": f"{issuer}/authorize",
                    "token_endpoint": f"{issuer}/token",
                    "jwks_uri": f"{issuer}/jwks",
                    "authorization_response_iss_parameter_supported": True,
                }
            )
        elif parts.path == "/jwks":
            self.answer({"keys": [KEY.as_dict(private=False)]})
        elif parts.path == "/asked":
            self.answer(asked)
        elif parts.path == "/authorize":
            asked.clear()
            asked.update(self.values)
            self.authorize()

    def authorize(self):
        grant = provider.get_consent_grant(self, end_user=USER)
        user = None if lies.get("error") else USER | lies.get("user", {})
        status, _, headers = provider.create_authorization_response(grant.request, grant_user=user, grant=grant)
        headers = dict(headers)
        joint = "&" if "?" in headers["Location"] else "?"
        named = {"iss": lies.get("iss", provider.issuer)} if lies.get("iss", "") is not None else {}
        headers["Location"] += joint + urlencode(named)
        self.answer("", status, headers)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/lie":
            lies.clear()
            lies.update(json.loads(body))
            self.answer({})
            return
        self.values = dict(parse_qsl(body.decode()))
        status, body, headers = provider.create_token_response(self)
        self.answer(body, status, dict(headers))

    def answer(self, body, status=200, headers=None):
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {"content-type": "application/json"}).items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
provider = Provider(f"http://127.0.0.1:{server.server_port}")
if __name__ == "__main__":
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()
