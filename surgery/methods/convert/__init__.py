"""Methods of ``moesurg convert``: the same function, stored in another way."""
