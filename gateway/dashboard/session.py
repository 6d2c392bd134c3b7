"""Who looks at a page: the one place where the dashboard asks, so that how people sign in is not its business."""

from starlette.requests import Request

from config.errors import RiosError
from gateway.endpoint import Caller, permitted
from gateway.request import identify
from gateway.roles import Permission, Reach, reach_of


async def current_caller(request: Request, needs: Permission) -> Caller | None:
    """The signed-in caller and how far ``needs`` reaches for them; None: nobody is signed in.

    Raises ApiError ``forbidden`` (or ``rate_limited``).
    """
    try:
        principal = await identify(request)
    except RiosError as error:
        if error.code == "unauthenticated":
            return None
        raise
    return Caller(principal, permitted(principal, needs))


def can(caller: Caller, permission: Permission) -> bool:
    """Whether a page offers something to them."""
    return reach_of(caller.principal.role, permission, caller.principal.scopes) is not Reach.NONE
