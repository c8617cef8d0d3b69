"""ELITE in the browser: upload a picture of an object, mark it, write a prompt, draw.

python app_gradio.py                                  the small world, nothing to download
python app_gradio.py --pretrained_model_name_or_path CompVis/stable-diffusion-v1-4 \\
    --global_mapper_path global_mapper.pt --local_mapper_path local_mapper.pt
ELITE_APP_AUTH=me:secret python app_gradio.py --host 0.0.0.0      others may use it too

Only this machine reaches the page unless --host or --share say otherwise, which need a password.
"""

import signal
from contextlib import closing

from elite.config import parse_config
from elite.console import OK, quiet_libraries, run
from elite.settings import AppConfig


def main() -> int:
    config = parse_config(AppConfig)
    quiet_libraries()
    from app.handlers import AppHandlers, example_views
    from app.page import build_page
    from app.server import check_exposure, private_files, read_auth, serve
    from app.studio import Studio
    from elite.data import PairFolder
    from elite.inference import load_pipeline, prepare_to_draw
    from elite.previews import fit_preview
    from elite.sam import Sam

    for name in ("SIGTERM", "SIGHUP"):  # uploads are removed then, too
        if number := getattr(signal, name, None):  # Windows has no SIGHUP
            signal.signal(number, signal.default_int_handler)
    auth = read_auth(config.auth)
    check_exposure(config.host, config.share, auth)  # before the model is loaded
    examples = PairFolder(config.test_data_dir)
    pipe = load_pipeline(config, config.local_mapper_path)
    prepare_to_draw(pipe, config)
    studio = Studio(
        pipe,
        placeholder_token=config.placeholder_token,
        resolution=config.resolution,
        batch_size=config.batch_size,
        model=config.pretrained_model_name_or_path,
        preview=fit_preview(pipe, example_views(examples)),
    )
    find = None if config.sam_name_or_path is None else Sam(config.sam_name_or_path)
    handlers = AppHandlers(studio, examples, round(config.max_megapixels * 1e6), find)
    with private_files(), closing(handlers):
        serve(
            build_page(handlers),
            host=config.host,
            port=config.port,
            share=config.share,
            auth=auth,
            max_upload=config.max_upload_mb * 2**20,
            queue_size=config.queue_size,
        )
    return OK


if __name__ == "__main__":
    run(main)
