"""Money beyond single requests: budgets, statements, invoices, payments, and the check that it all ties.

``budget`` (the rule), ``payment`` (the signature) and ``sheet`` (CSV) are pure; the others are blocking calls on the
accounts database. What changes a balance stands in ``gateway/books.py`` alone.
"""
