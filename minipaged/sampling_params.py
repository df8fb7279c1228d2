from minipaged.sampling import *
