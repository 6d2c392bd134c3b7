"""How users prove who they are, and what they get for it.

``identity`` is the face: every way to sign in, to go on and to leave, as the HTTP API offers them; ``opening`` makes it
from the settings. Under it, each in a file: ``proofs`` (what people show, wrong ones counted), ``passwords``,
``factors`` (TOTP), ``guesses`` (how often one may try), ``sessions`` and refresh tokens, ``tokens`` (signed ones, their
keys), ``invites``, ``people`` (who signs in), ``oidc`` and ``provider`` (signing in elsewhere),
``browser`` (cookies and what other sites may not do), ``vault`` (secrets at rest).
"""
