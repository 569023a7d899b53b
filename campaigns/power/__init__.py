"""The parts of ``campaigns.power_loss`` and ``campaigns.failing_calls``.

recording  a disk that records its operations, and can fail or die
cut        what a disk may hold after a power cut
program    a random sequence of saves on such a disk, and what must hold at each instant of it
search     the disks after a cut at each instant: built, checked, counted
"""
