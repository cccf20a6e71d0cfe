"""Who gets which bits: from a sensitivity table and a budget to a plan, exact and certified."""
