from libs.common.service import run
from services.detector_proxy.app import parts
from services.detector_proxy.settings import DetectorProxySettings

if __name__ == "__main__":
    run("detector_proxy", DetectorProxySettings, parts)
