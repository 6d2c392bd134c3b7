"""GraphQL's read side over the same functions and the same table of roles as the routes under ``/v1``.

``fields`` says what can be asked and with which permission (add a :class:`~gateway.graphql.fields.Part` to join more),
``limits`` what a document may cost, ``answering`` runs one. graphql-core is only imported by the first request.
"""
