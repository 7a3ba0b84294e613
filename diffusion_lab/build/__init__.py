"""From a composed configuration to objects; what cannot work is refused here."""
