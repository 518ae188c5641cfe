"""The router: a closed-form start from the proxies, then training on the proxies alone."""
