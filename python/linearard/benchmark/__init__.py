"""`python -m linearard.benchmark`: relation KL side by side with what a user would otherwise take.

Every peer computes the same loss, mean over heads and rows of KL(teacher || student), forward and backward, in one run
on one device, so that times can be compared. Beside each time stand the memory that it took and how far its gradient
and its value are from float64 on the same inputs: a fast peer whose gradient is noise is not an alternative.
"""
