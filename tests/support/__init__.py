"""What tests of several folders share: plain modules, imported where they are used."""
