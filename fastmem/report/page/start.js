startUnits();
startImages();
startGallery();
startEdits();
startSweep();
// the charts take the colours of the page, which follow the system
window.matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => charts.forEach((draw) => draw()));
document.documentElement.setAttribute('data-ready', '');
