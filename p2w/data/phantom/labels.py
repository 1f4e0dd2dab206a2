"""What a voxel of a label map means."""

from enum import IntEnum


class Label(IntEnum):
    """Values of a phantom's label map (uint8). A voxel belongs to what fills more than half of it."""

    AIR = 0  # outside the patient; also the padding outside the field of view
    FAT = 1  # under the skin and between muscles; the skin itself
    MUSCLE = 2  # also the diaphragm
    BREAST = 3  # glandular tissue
    MEDIASTINUM = 4  # fat and nodes between the lungs; abdominal fat
    HEART = 5  # myocardium and chambers
    AORTA = 6
    GREAT_VESSEL = 7  # pulmonary trunk and its two branches, both venae cavae, arch branches
    OESOPHAGUS = 8
    LIVER = 9
    SPLEEN = 10
    STOMACH = 11  # wall and fluid
    GAS = 12  # in the stomach
    LUNG = 13  # parenchyma and fissures
    VESSEL = 14  # arteries and veins inside the lungs
    AIRWAY_WALL = 15
    AIRWAY = 16  # air in the trachea and bronchi
    SPINE = 17
    DISC = 18
    RIB = 19
    BONE = 20  # sternum, clavicles, scapulae, humeral heads
    CARTILAGE = 21  # of the ribs
    NODULE = 22
    TABLE = 23


LUNGS = (Label.LUNG, Label.VESSEL, Label.NODULE)  # what a lung mask holds; airways are left out
