"""The dashboard: pages for people under ``/dashboard``, made on the server, alive by server-sent events.

``routes`` lists every page and action with the permission it needs and lets requests in; ``session`` says who asks;
``views`` gathers what a page shows; ``live`` tells open pages what changes; ``charts`` and ``words`` turn numbers into
pictures and text; ``assets`` serves what stands in ``static``. Nothing here decides anything about money, users or the
swarm: pages read the same things that the API reads, and their buttons call the API.
"""
